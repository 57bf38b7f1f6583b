"""What the benchmarks that start real engines share. Holds no measurement itself."""

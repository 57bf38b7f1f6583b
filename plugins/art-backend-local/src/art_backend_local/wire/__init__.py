"""What crosses between client and host: requests, events, errors, and the files by which they find each other."""

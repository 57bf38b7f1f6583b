"""The user's side: `LocalBackend`, which finds or starts the host of its path and follows its work."""

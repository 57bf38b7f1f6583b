"""Training on a machine elsewhere: so far the messages of the wire (`wire`), and no backend."""

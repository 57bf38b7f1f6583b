"""Reports what ART logs to Trackio, on this machine. Nothing is to be imported from here: installing it is using it."""

"""Reports what ART logs to MLflow. Nothing is to be imported from here: installing it is using it."""

"""The demos: each prepares a model directory, a prompt file and a configuration, then takes the path of any run."""

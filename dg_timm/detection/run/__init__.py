"""From the options of a command line to data, a detector, a training and its results."""

"""Which rows form a batch, and what an image becomes: functions of the seed, the epoch and the row alone."""

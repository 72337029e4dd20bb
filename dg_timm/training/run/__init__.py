"""From options and recipes to a run and its end."""

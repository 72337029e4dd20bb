"""What runs aggregation here: say, compile ahead of time, release memory."""

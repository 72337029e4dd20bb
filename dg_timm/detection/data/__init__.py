"""Detection data sets: annotations, which are checked when they are read, and the batches made of them."""

"""SuperSimpleNet surface-defect detection: the model and all that one machine needs to train and run it."""

"""Our estimators beside laplace-torch, one file a group of rows."""

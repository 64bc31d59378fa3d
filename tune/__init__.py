"""Choose how each matrix is stored: sensitivity measured one by one, then the best sum within a budget, as a recipe."""

"""What every layer agrees on: config, recipe, schemes, targets, plan, manifest, errors. Standard library and numpy only."""

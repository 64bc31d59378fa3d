"""From a recipe to entries: which weights are quantized, how, and in which storage layout."""

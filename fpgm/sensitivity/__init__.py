"""How much each layer alone can lose, and the rates by layer that follow from it."""

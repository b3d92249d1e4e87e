"""`fpgm-study`: do pruning criteria agree on a network, and can they tell its filters apart?"""

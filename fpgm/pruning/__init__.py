"""How filters are held at zero while a network trains: what methods are made of."""

"""What happens to filters while the network trains."""

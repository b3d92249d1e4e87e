"""What a network is made of: its operations, who writes and who reads each channel, its cost."""

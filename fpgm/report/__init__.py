"""`fpgm-report`: many runs as tables and pictures, the papers beside them. No torch."""

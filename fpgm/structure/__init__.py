"""What of a network can be pruned, group by group, and what cannot, with the line that says why."""

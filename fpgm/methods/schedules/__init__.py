"""Methods that own the selection, `keep`: schedule=NAME takes one, and each has its YAML in
configs/schedule."""

"""Methods that act beside a schedule: method=NAME takes any number, and each has its YAML in
configs/method."""

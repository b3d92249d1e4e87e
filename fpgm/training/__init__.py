"""The loop: a task is prepared, trained, finished."""

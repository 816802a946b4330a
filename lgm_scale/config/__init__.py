"""What every run can be told: the schema, how files become it, and the rules between its keys."""

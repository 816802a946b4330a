"""Where the speed figures come from."""

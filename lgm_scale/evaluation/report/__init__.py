"""Tables, pictures and the page of a finished sweep."""

"""Files of the user: names that are allowed, places that are held, writing and deleting."""

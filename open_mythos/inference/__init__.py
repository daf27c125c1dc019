"""Generation. Light: importing it loads nothing."""

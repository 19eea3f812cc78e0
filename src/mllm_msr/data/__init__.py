"""From raw logs to frozen ranking tasks."""

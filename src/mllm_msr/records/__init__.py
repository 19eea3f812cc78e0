"""What flows through the project, as types: tables, runs, recipes, results. Imports nothing of ours."""

"""Results as data: run records, statistics over seeds, tables, plots and the report."""

"""Not here: pyarrow would import it wherever it is installed, for nothing, at every start."""

raise ModuleNotFoundError("pandas is left out", name="pandas")

"""Look inside a run: probes make records, plots draw from records only, the report puts them on one page."""

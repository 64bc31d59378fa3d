"""One rewrite, one file. A pass takes a ModelAndPlan and says whether it changed anything."""

"""How the ranks of one trainer work together: rank 0 leads, the others do what it says."""

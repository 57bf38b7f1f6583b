"""torchtune as a training engine of ART. Importing it loads neither torchtune nor torch."""

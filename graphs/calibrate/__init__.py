"""What a calibration text shows of each matrix's inputs, gathered layer by layer in bounded memory."""

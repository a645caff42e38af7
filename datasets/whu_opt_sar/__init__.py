"""WHU-OPT-SAR: land cover of Hubei from GaoFen-1 and GaoFen-3, and made-up scenes in its layout."""

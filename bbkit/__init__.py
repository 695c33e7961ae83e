"""BalancedBio kit: an open reproduction of biomedical alignment without the alignment tax."""

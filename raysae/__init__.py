"""raysae: which orthogonality regularizer lets a sparse autoencoder switch one domain off?"""

__version__ = "0.1.0"

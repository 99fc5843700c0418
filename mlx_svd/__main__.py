"""``python -m mlx_svd`` is the ``mlx-svd`` command."""

from mlx_svd.cli.app import main

if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""The main job in one line: python run_search.py --space orth.yaml"""

from raysae.cli import main

if __name__ == "__main__":
    main()

"""Comparisons with other solvers: `python -m bench report`, `python -m bench compare OLD.json NEW.json`, and the scripts
beside this file, each of which says what it measures."""

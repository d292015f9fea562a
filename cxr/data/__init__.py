"""From files and tables to labelled images of known patients."""

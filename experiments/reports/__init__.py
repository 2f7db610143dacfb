"""Reports that people look at: one self-contained HTML file for runs, sweeps, attacks and papers.

``collect`` reads directories as they are, whole or not; a module a kind (``run``, ``sweep``, ``attack``, ``papers``)
makes of them what a page consists of (``page``), with ``charts``; ``render`` writes the file from the templates in
``assets``. Charts are Plotly's, whose script ships in its package: compressed it costs a report 2 MB where Bokeh's
would cost 0.5, but it draws SVG, whose text stays text to a browser, a search and a printer, and takes the colours of
the dark in one call, where Bokeh paints pixels on a canvas and has a model of the document to restyle piece by piece.
"""

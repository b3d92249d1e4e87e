"""The papers' figures of a network: `fpgm-figure`."""

"""Every model that can be built offline, built twice: plainly, and recorded then materialised. See docs/zoo.md."""

"""Parts that other people's tools load: each module needs the tool that it is for."""

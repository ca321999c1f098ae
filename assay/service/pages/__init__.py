"""The web page: templates, one style sheet, sessions in cookies, and the verdict as a reader sees it. No scripts."""

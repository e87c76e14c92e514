"""What is asked of the servers: the cells of the table, and the pictures, texts and bodies of their requests."""

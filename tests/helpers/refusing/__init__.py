"""One call of a command that the operating system refuses: any call, in any documented way.

refusing.c    a library that is loaded before the C library, counts calls, and lets one fail
server        a process that has loaded the program, and forks a child for each command
asking        the test's end of it
looking       what holds of a repository, whatever was refused; in a child of the server, too
"""

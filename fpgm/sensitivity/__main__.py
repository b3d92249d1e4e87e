from fpgm.sensitivity.command import main

main()
